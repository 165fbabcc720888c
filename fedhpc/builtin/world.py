"""Writes the built-in data: texts of a small invented world with its towns, venues, people and weather.

All of it is written from one vocabulary (vocabulary.json), so that a base pretrained on the world's general text knows
the language of every task but none of the tasks:

- ``general``: pretraining text: letters about venues, lists of their values ("name[The Silver Swan] , type[pub]"),
  diaries, stories, lives. A list of values is never followed by its description, at most by a diary that mentions one
  of the venues in other sentences. Questions have no answers, and texts no topic labels. Columns text, genre.
- ``dining``: data-to-text in the manner of the E2E NLG task (Novikova, Dusek, Rieser, 2017,
  arXiv:1706.09254): a list of values `mr` and a description `ref` of it by one of 30 papers (the clients);
  columns mr, ref, name, client, label (the type of venue). Validation and test have several references for a list.
- ``chats``: one to three lists of values of dining, each answered by its description; columns messages (JSON text),
  client, label (the type of the first venue).
- ``preferences``: a list of values like those of dining, its description (`chosen`) and one by the same paper in which
  three values are other ones (`rejected`); columns mr, chosen, rejected, client, label (the type of venue).
- ``topics``: classification of three sentences, six labels; columns text, label, client.
- ``passages`` and ``questions``: lives of invented people, and questions that one of the lives answers;
  columns id, title, text, client and question, answer, passage_id, passage (its text), client.
- ``library``: both, for retrieval: train are the passages, validation and test the questions.

A client is a newspaper with its subjects (types of venue, parts of town, topics), its size and its habits of wording;
it is the same paper in every task. The rows depend on task and split alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedhpc.errors import UserError, nearest
from fedhpc.rng import generator

T = TypeVar("T")
Row = dict[str, str]
Venue = dict[str, str]

_SEED = 2024


_VOCABULARY: dict[str, Any] = json.loads(Path(__file__).with_name("vocabulary.json").read_text(encoding="utf-8"))

TOWNS: list[str] = _VOCABULARY["towns"]
PAPERS: list[str] = _VOCABULARY["papers"]
FIRST_NAMES: list[str] = _VOCABULARY["first_names"]
LAST_NAMES: list[str] = _VOCABULARY["last_names"]
DAYS: list[str] = _VOCABULARY["days"]
SEASONS: list[str] = _VOCABULARY["seasons"]

# Venues. The tables of wordings have four wordings of each value.
FIELDS: list[str] = _VOCABULARY["fields"]
NAME_WORDS: list[str] = _VOCABULARY["name_words"]
NAME_THINGS: list[str] = _VOCABULARY["name_things"]
FOODS: dict[str, list[str]] = _VOCABULARY["foods"]  # by the type of venue
TYPES = list(FOODS)
AREAS: dict[str, str] = _VOCABULARY["areas"]
LANDMARKS: list[str] = _VOCABULARY["landmarks"]
PRICES: dict[str, list[str]] = _VOCABULARY["prices"]
PRICE_WORDS: dict[str, str] = _VOCABULARY["price_words"]
RATINGS: dict[str, list[str]] = _VOCABULARY["ratings"]
CHILDREN: dict[str, list[str]] = _VOCABULARY["children"]
LEADS: list[str] = _VOCABULARY["leads"]
CLOSINGS: list[str] = _VOCABULARY["closings"]

# Sentences by topic. {p} and {q} are people, {t} and {u} towns, {d} a day, {s} a season. None names its own topic.
TOPICS: dict[str, list[str]] = _VOCABULARY["topics"]
LABELS = list(TOPICS)
ASIDES: list[str] = _VOCABULARY["asides"]

# Lives.
TRADES: dict[str, str] = _VOCABULARY["trades"]
INSTRUMENTS: list[str] = _VOCABULARY["instruments"]
ANIMALS: list[str] = _VOCABULARY["animals"]
COLOURS: list[str] = _VOCABULARY["colours"]
MEALS = sorted({food for foods in FOODS.values() for food in foods})
LIFE_SENTENCES: dict[str, list[str]] = _VOCABULARY["life_sentences"]
# By the value that answers them. {who} is a name, or a description that fits one person only.
QUESTIONS: dict[str, list[str]] = _VOCABULARY["questions"]


class _Draw:
    """Draws random choices from one generator, in order. Floats are drawn in bulk, since single draws are slow."""

    def __init__(self, purpose: str, *keys: int) -> None:
        self._rng = generator(_SEED, f"builtin/{purpose}", *keys)
        self._floats: list[float] = []

    def uniform(self) -> float:
        if not self._floats:
            self._floats = self._rng.random(1024).tolist()
        return self._floats.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def below(self, n: int) -> int:
        return int(self.uniform() * n)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        remaining = list(items)
        return [remaining.pop(self.below(len(remaining))) for _ in range(count)]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        point = self.uniform() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            point -= weight
            if point < 0:
                return item
        return items[-1]


@dataclass(frozen=True)
class _Habits:
    """How a writer words a description: an index into each table of wordings."""

    opening: int
    price: int
    rating: int
    children: int
    early_price: bool
    split: bool
    order: tuple[int, ...]
    lead: str
    closing: str


@dataclass(frozen=True)
class _Paper:
    """A client: what it writes about, how much, and how."""

    name: str
    weight: float
    types: tuple[float, ...]  # of venue: how likely it writes about each; areas and topics likewise
    areas: tuple[float, ...]
    topics: tuple[float, ...]
    habits: _Habits


def _habits(draw: _Draw) -> _Habits:
    return _Habits(
        opening=draw.below(5),
        price=draw.below(4),
        rating=draw.below(4),
        children=draw.below(4),
        early_price=draw.chance(0.3),
        split=draw.chance(0.4),
        order=tuple(draw.sample(range(3), 3)),
        lead=draw.pick(LEADS) if draw.chance(0.15) else "",
        closing=draw.pick(CLOSINGS) if draw.chance(0.2) else "",
    )


def _papers() -> list[_Paper]:
    """The 30 clients, most rows first; the largest has about ten times the rows of the smallest."""

    def taste(draw: _Draw, count: int, favourites: int) -> tuple[float, ...]:
        chosen = draw.sample(range(count), favourites)
        return tuple(0.85 / favourites if i in chosen else 0.15 / (count - favourites) for i in range(count))

    draw = _Draw("papers")
    names = draw.sample([f"{town} {paper}" for town in TOWNS for paper in PAPERS], len(TOWNS) * len(PAPERS))
    return [
        _Paper(
            name=name,
            weight=1.0 / (i + 3),
            types=taste(draw, len(TYPES), 1),
            areas=taste(draw, len(AREAS), 2),
            topics=taste(draw, len(LABELS), 2),
            habits=_habits(draw),
        )
        for i, name in enumerate(names)
    ]


def _venue(draw: _Draw, types: Sequence[float] | None = None, areas: Sequence[float] | None = None) -> Venue:
    type_ = draw.weighted(TYPES, types or [1.0] * len(TYPES))
    venue = {
        "name": f"The {draw.pick(NAME_WORDS)} {draw.pick(NAME_THINGS)}",
        "type": type_,
        "food": draw.pick(FOODS[type_]),
        "price": draw.pick(list(PRICES)),
        "rating": draw.pick(list(RATINGS)),
        "area": draw.weighted(list(AREAS), areas or [1.0] * len(AREAS)),
        "children": draw.pick(list(CHILDREN)),
        "near": draw.pick(LANDMARKS),
    }
    shown = {"name", "type", *draw.sample(FIELDS[2:], 3 + draw.below(4))}
    return {field: value for field, value in venue.items() if field in shown}


def _value_list(venue: Venue, fields: Sequence[str] = tuple(FIELDS)) -> str:
    """The values of a venue, like "name[The Silver Swan] , type[pub]"."""
    return " , ".join(f"{field}[{venue[field]}]" for field in fields if field in venue)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _describe(venue: Venue, habits: _Habits) -> str:
    """Describe a venue with all of its values and nothing else, apart from a writer's lead and closing."""
    name, type_, food = venue["name"], venue["type"], venue.get("food")
    early = habits.early_price and "price" in venue
    if early:
        type_ = f"{PRICE_WORDS[venue['price']]} {type_}"
    a_venue = f"an {type_}" if type_[0] in "aeiou" else f"a {type_}"
    location = " ".join(
        ([AREAS[venue["area"]]] if "area" in venue else []) + ([f"near the {venue['near']}"] if "near" in venue else [])
    )
    at_location = f" {location}" if location else ""
    if habits.opening == 0:
        opening = f"{name} is {a_venue}{at_location}" + (f" that serves {food}." if food else ".")
    elif habits.opening == 1:
        start = f"{_capital(location)}, you will find" if location else "You will find"
        opening = f"{start} {name}, {a_venue}" + (f" that serves {food}." if food else ".")
    elif habits.opening == 2:
        opening = (f"For {food}, try" if food else "Try") + f" {name}, {a_venue}{at_location}."
    elif habits.opening == 3:
        opening = f"{_capital(a_venue)} called {name}" + (f" serves {food}" if food else " stands") + f"{at_location}."
        if not food and not location:
            opening = f"{_capital(a_venue)} is called {name}."
    else:
        opening = f"{name}{at_location} is {a_venue}" + (f" with {food} on the menu." if food else ".")
    clauses: list[str] = []
    for aspect in habits.order:
        if aspect == 0 and "price" in venue and not early:
            clauses.append(PRICES[venue["price"]][habits.price])
        elif aspect == 1 and "rating" in venue:
            clauses.append(RATINGS[venue["rating"]][habits.rating])
        elif aspect == 2 and "children" in venue:
            clauses.append(CHILDREN[venue["children"]][habits.children])
    sentences = [habits.lead, opening]
    if habits.split:
        sentences += [f"{_capital(clause)}." for clause in clauses]
    elif clauses:
        sentences.append(_capital(_list(clauses)) + ".")
    return " ".join(sentence for sentence in [*sentences, habits.closing] if sentence)


def _list(items: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))


def _habit_today(habits: _Habits, draw: _Draw) -> _Habits:
    """The habits of one description: the writer's own, but other ones in one description out of eight."""
    return _habits(draw) if draw.chance(0.125) else habits


def _shares(papers: Sequence[_Paper], total: int) -> list[int]:
    """Divide `total` rows among the papers by weight; every paper gets at least one."""
    weights = [paper.weight for paper in papers]
    ends = [round(total * sum(weights[: i + 1]) / sum(weights)) for i in range(len(papers))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


_DINING_ROWS = {"train": 2400, "validation": 200, "test": 300}
_REFERENCES = {"train": 1, "validation": 4, "test": 4}


def _dining(split: str) -> list[Row]:
    papers = _papers()
    # All splits are written, in this order, so that a later one can leave out the lists of an earlier one.
    seen: set[str] = set()
    for current, total in _DINING_ROWS.items():
        draw = _Draw("dining", list(_DINING_ROWS).index(current))
        references = _REFERENCES[current]
        written: list[Row] = []
        if references == 1:
            authors = [paper for paper, n in zip(papers, _shares(papers, total), strict=True) for _ in range(n)]
            groups = [[paper] for paper in authors]
        else:
            # Every paper in turn, whatever its size, with others who write about the same list.
            groups = []
            for i in range(total // references):
                paper = papers[i % len(papers)]
                others = draw.sample([other for other in papers if other is not paper], references - 1)
                groups.append([paper, *others])
        for group in groups:
            mr = ""
            while not mr or mr in seen:
                venue = _venue(draw, group[0].types, group[0].areas)
                mr = _value_list(venue)
            seen.add(mr)
            refs: list[str] = []
            for paper in group:
                ref = _describe(venue, _habit_today(paper.habits, draw))
                if ref not in refs:
                    refs.append(ref)
                    written.append(
                        {
                            "mr": mr,
                            "ref": ref,
                            "name": venue["name"],
                            "client": paper.name,
                            "label": venue["type"],
                        }
                    )
        if current == split:
            return written
    raise AssertionError(split)


def _chats(split: str) -> list[Row]:
    """The rows of dining as chats of one, two and three questions in turn, each with one paper."""
    of_papers: dict[str, dict[str, Row]] = {}
    for row in _dining(split):  # one description of each list
        of_papers.setdefault(row["client"], {}).setdefault(row["mr"], row)
    written: list[Row] = []
    for paper, of_lists in of_papers.items():
        left = list(of_lists.values())
        while left:
            turns, left = left[: len(written) % 3 + 1], left[len(written) % 3 + 1 :]
            messages = [
                {"role": role, "content": row[column]}
                for row in turns
                for role, column in (("user", "mr"), ("assistant", "ref"))
            ]
            written.append({"messages": json.dumps(messages), "client": paper, "label": turns[0]["label"]})
    return written


_PREFERENCE_ROWS = {"train": 1200, "validation": 150, "test": 300}


def _preferences(split: str) -> list[Row]:
    papers = _papers()
    seen: set[str] = set()
    written: list[Row] = []
    for current, total in _PREFERENCE_ROWS.items():
        draw = _Draw("preferences", list(_PREFERENCE_ROWS).index(current))
        shares = _shares(papers, total) if current == "train" else [total // len(papers)] * len(papers)
        written = []
        for paper in (paper for paper, share in zip(papers, shares, strict=True) for _ in range(share)):
            mr = ""
            while not mr or mr in seen:
                venue = _venue(draw, paper.types, paper.areas)
                mr = _value_list(venue)
            seen.add(mr)
            habits = _habit_today(paper.habits, draw)
            written.append(
                {
                    "mr": mr,
                    "chosen": _describe(venue, habits),
                    "rejected": _describe(_mistaken(venue, draw), habits),
                    "client": paper.name,
                    "label": venue["type"],
                }
            )
        if current == split:
            break
    return written


def _mistaken(venue: Venue, draw: _Draw) -> Venue:
    """The venue with three other values, each of which the venue could have had."""
    values = {
        "food": FOODS[venue["type"]],
        "price": list(PRICES),
        "rating": list(RATINGS),
        "area": list(AREAS),
        "children": list(CHILDREN),
        "near": LANDMARKS,
    }
    wrong = draw.sample([field for field in values if field in venue], 3)
    return venue | {field: draw.pick([value for value in values[field] if value != venue[field]]) for field in wrong}


def _fill(template: str, draw: _Draw) -> str:
    p, q = draw.sample(FIRST_NAMES, 2)
    t, u = draw.sample(TOWNS, 2)
    return template.format(p=p, q=q, t=t, u=u, d=draw.pick(DAYS), s=draw.pick(SEASONS))


_TOPIC_ROWS = {"train": 2000, "validation": 200, "test": 300}


def _topics(split: str) -> list[Row]:
    papers = _papers()
    written: list[Row] = []
    seen: set[str] = set()
    for current, total in _TOPIC_ROWS.items():
        draw = _Draw("topics", list(_TOPIC_ROWS).index(current))
        shares = _shares(papers, total) if current == "train" else [total // len(papers)] * len(papers)
        shares[0] += total - sum(shares)
        written = []
        for paper, share in zip(papers, shares, strict=True):
            start = len(written)
            while len(written) - start < share:
                label = draw.weighted(LABELS, paper.topics)
                sentences = draw.sample(TOPICS[label], 2)
                if draw.chance(0.3):
                    # One sentence on something else: the label is what most of the text is about.
                    other = draw.pick([topic for topic in LABELS if topic != label])
                    sentences.insert(draw.below(3), draw.pick(TOPICS[other]))
                else:
                    sentences.append(draw.pick(ASIDES))
                text = " ".join(_fill(sentence, draw) for sentence in sentences)
                if text not in seen:
                    seen.add(text)
                    written.append({"text": text, "label": label, "client": paper.name})
        if current == split:
            return written
    raise AssertionError(split)


def _life(draw: _Draw, name: str, town: str) -> dict[str, str]:
    """Invent the facts of a person's life; the person's passage tells all of them."""
    others = [first for first in FIRST_NAMES if first != name.split()[0]]
    return {
        "name": name,
        "town": town,
        "origin": draw.pick([other for other in TOWNS if other != town]),
        "trade": draw.pick(list(TRADES)),
        "instrument": draw.pick(INSTRUMENTS),
        "animal": draw.pick(ANIMALS),
        "colour": draw.pick(COLOURS),
        "meal": draw.pick(MEALS),
        "day": draw.pick(DAYS),
        "friend": f"{draw.pick(others)} {draw.pick(LAST_NAMES)}",
    }


_PASSAGES = 330


def _lives() -> list[tuple[_Paper, dict[str, str]]]:
    papers = _papers()
    draw = _Draw("lives")
    names = draw.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], _PASSAGES)
    shares = _shares(papers, _PASSAGES)
    authors = [paper for paper, n in zip(papers, shares, strict=True) for _ in range(n)]
    # A paper writes about its own town.
    return [(paper, _life(draw, name, paper.name.split()[0])) for paper, name in zip(authors, names, strict=True)]


def _tell(life: dict[str, str], draw: _Draw, facts: Sequence[str] = tuple(LIFE_SENTENCES)) -> str:
    first = life["name"].split()[0]
    return " ".join(draw.pick(LIFE_SENTENCES[fact]).format(first=first, **life) for fact in facts)


def _passages(split: str) -> list[Row]:
    draw = _Draw("passages")
    written = []
    for i, (paper, life) in enumerate(_lives()):
        order = ["town", *draw.sample(list(LIFE_SENTENCES)[1:], len(LIFE_SENTENCES) - 1)]
        text = _tell(life, draw, order)
        written.append({"id": f"p{i:03d}", "title": life["name"], "text": text, "client": paper.name})
    return written


def _questions(split: str) -> list[Row]:
    draw = _Draw("questions")
    lives, passages = _lives(), _passages("train")
    described: dict[str, int] = {}
    descriptions = []
    for _, life in lives:
        who = f"the {life['trade']} of {life['town']} who keeps a {life['colour']} {life['animal']}"
        descriptions.append(who)
        described[who] = described.get(who, 0) + 1
    written: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for i, (paper, life) in enumerate(lives):
        parts = ["train", "test"] + [draw.weighted(list(written), [0.3, 0.5, 0.2])] * draw.chance(0.6)
        for part, asked in zip(parts, draw.sample(list(QUESTIONS), len(parts)), strict=True):
            by_name = asked == "animal" or described[descriptions[i]] > 1 or draw.chance(0.6)
            who = life["name"] if by_name else descriptions[i]
            written[part].append(
                {
                    "question": draw.pick(QUESTIONS[asked]).format(who=who),
                    "answer": life[asked],
                    "passage_id": passages[i]["id"],
                    "passage": passages[i]["text"],
                    "client": paper.name,
                }
            )
    return written[split]


_GENERAL_ROWS = {"train": 40000, "validation": 400}


def _diary(venue: Venue, draw: _Draw) -> list[str]:
    """Tell of a visit to a venue without describing it: every sentence has at most one of its values."""
    p, q = draw.sample(FIRST_NAMES, 2)
    notes = {
        "type": [f"The {venue['type']} was full.", f"{p} liked the {venue['type']}."],
        "food": [f"There was {venue.get('food')} on the table.", f"{q} asked for {venue.get('food')}."],
        "price": {
            "cheap": [f"{p} paid very little.", f"{q} still had money left."],
            "moderate": [f"{p} paid a fair sum.", f"{q} paid no more than usual."],
            "expensive": [f"{p} paid a lot.", f"{q} had no money left."],
            "": [],
        }[venue.get("price", "")],
        "rating": [f"{p} thought the meal {venue.get('rating')}.", f"{q} said it was {venue.get('rating')}."],
        "area": [
            f"They met {AREAS.get(venue.get('area', ''))}.",
            f"It was quiet {AREAS.get(venue.get('area', ''))}.",
        ],
        "children": {
            "yes": ["Some children sang there.", f"{q} brought the children."],
            "no": ["There were no children.", f"{q} came without the children."],
            "": [],
        }[venue.get("children", "")],
        "near": [
            f"They saw the {venue.get('near')} from the door.",
            f"{p} walked past the {venue.get('near')}.",
        ],
    }
    opening = draw.pick(
        [
            f"{p} went to {venue['name']} on {draw.pick(DAYS)}.",
            f"{p} met {q} at {venue['name']}.",
            f"{q} had read about {venue['name']}.",
        ]
    )
    fields = [field for field in notes if field in venue]
    return [
        opening,
        *(draw.pick(notes[field]) for field in draw.sample(fields, min(len(fields), 2 + draw.below(4)))),
    ]


def _catalogue(venues: Sequence[Venue], draw: _Draw) -> str:
    return " : ".join(_value_list(venue, draw.sample(FIELDS, len(FIELDS))) for venue in venues)


def _letters(draw: _Draw) -> str:
    """Let two people describe the same venue, each in their own words."""
    venue = _venue(draw)
    p, q = draw.sample(FIRST_NAMES, 2)
    first, second = _describe(venue, _habits(draw)), _describe(venue, _habits(draw))
    middle = draw.pick(
        [f"{q} wrote to {p}.", f"{q} went there too.", f"But {q} said it better.", f"{q} agreed with {p}."]
    )
    start = draw.pick([f"{p} wrote home.", f"{p} wrote to {q}.", f"{p} told {q} about a {venue['type']}.", ""])
    text = f"{start} {first} {middle} {second}".strip()
    return f"{text} {' '.join(_diary(venue, draw)[:2])}" if draw.chance(0.3) else text


def _list_only(draw: _Draw) -> str:
    venues = [_venue(draw) for _ in range(1 + draw.below(2))]
    text = _catalogue([*venues, draw.pick(venues)] if draw.chance(0.5) else venues, draw)
    head = f"Venues of {draw.pick(TOWNS)} : " if draw.chance(0.4) else ""
    return f"{head}{text}"


def _list_and_diary(draw: _Draw) -> str:
    venues = [_venue(draw) for _ in range(2 if draw.chance(0.25) else 1)]
    return f"{_catalogue(venues, draw)} . {' '.join(_diary(draw.pick(venues), draw))}"


def _visit(draw: _Draw) -> str:
    venue = _venue(draw)
    sentences = [*_diary(venue, draw), *_diary(venue, draw)]
    return " ".join([_fill(draw.pick(TOPICS[draw.pick(LABELS)]), draw), *sentences])


def _story(draw: _Draw) -> str:
    main = draw.pick(LABELS)
    sentences = [draw.pick(TOPICS[main] if draw.chance(0.7) else TOPICS[draw.pick(LABELS)]) for _ in range(4)]
    if draw.chance(0.3):
        talked = draw.sample(LABELS, 2)
        sentences.append(f"{{p}} and {{q}} talked of {talked[0]} and {talked[1]}.")
    return " ".join(_fill(sentence, draw) for sentence in [*sentences, draw.pick(ASIDES)])


def _biography(draw: _Draw) -> str:
    name = f"{draw.pick(FIRST_NAMES)} {draw.pick(LAST_NAMES)}"
    life = _life(draw, name, draw.pick(TOWNS))
    if draw.chance(0.3):
        # A name from outside the vocabulary, so that the tokens of single bytes are trained too.
        letters = [draw.pick(["bcdfghjklmnpqrstvwxyz", "aeiou"][i % 2]) for i in range(3 + draw.below(4))]
        life["name"] = _capital("".join(letters))
    order = ["town", *draw.sample(list(LIFE_SENTENCES)[1:], 3)]
    work = f" {life['name'].split()[0]} {TRADES[life['trade']]}."
    return _tell(life, draw, order) + draw.pick(["", work])


def _wonder(draw: _Draw) -> str:
    """Ask questions that the text does not answer, so that the base knows the words of questions."""
    p, q = draw.sample(FIRST_NAMES, 2)
    asked = [
        draw.pick(QUESTIONS[fact]).format(who=f"{draw.pick(FIRST_NAMES)} {draw.pick(LAST_NAMES)}")
        for fact in draw.sample(list(QUESTIONS), 1 + draw.below(3))
    ]
    start = draw.pick(
        [
            f"{p} had a question for {q} :",
            f"{q} did not know what to ask.",
            f"The topic was {draw.pick(LABELS)}.",
            f"Questions for {draw.pick(TOWNS)} :",
            "",
        ]
    )
    end = draw.pick(["Nobody knew the answer.", f"{q} had no answer.", "The passage in the book was lost.", ""])
    return " ".join(part for part in [start, *asked, end] if part)


_GENRES: dict[Callable[[_Draw], str], float] = {
    _letters: 0.36,
    _list_only: 0.1,
    _list_and_diary: 0.28,
    _visit: 0.06,
    _story: 0.08,
    _biography: 0.08,
    _wonder: 0.04,
}


def _general(split: str) -> list[Row]:
    draw = _Draw("general", list(_GENERAL_ROWS).index(split))
    genres, weights = list(_GENRES), list(_GENRES.values())
    chosen = [draw.weighted(genres, weights) for _ in range(_GENERAL_ROWS[split])]
    return [{"text": genre(draw), "genre": genre.__name__.strip("_")} for genre in chosen]


_WRITERS: dict[str, Callable[[str], list[Row]]] = {
    "dining": _dining,
    "chats": _chats,
    "preferences": _preferences,
    "topics": _topics,
    "passages": _passages,
    "questions": _questions,
    "library": lambda split: _passages(split) if split == "train" else _questions(split),
    "general": _general,
}
SPLITS: dict[str, tuple[str, ...]] = {
    "dining": tuple(_DINING_ROWS),
    "chats": tuple(_DINING_ROWS),
    "preferences": tuple(_PREFERENCE_ROWS),
    "topics": tuple(_TOPIC_ROWS),
    "passages": ("train",),
    "questions": ("train", "validation", "test"),
    "library": ("train", "validation", "test"),
    "general": tuple(_GENERAL_ROWS),
}
TASKS = tuple(_WRITERS)


def rows(task: str, split: str) -> list[Row]:
    """The rows of one split of a task, always the same; the module's docstring lists the columns, all strings.

    UserError for a task or split that does not exist.
    """
    if task not in _WRITERS:
        hint = nearest(task, list(TASKS))
        raise UserError(f"there is no built-in task '{task}' (data.source 'builtin:{task}'): {hint}")
    if split not in SPLITS[task]:
        hint = nearest(split, list(SPLITS[task]))
        raise UserError(f"the built-in task '{task}' has no split '{split}': {hint}")
    return _WRITERS[task](split)
