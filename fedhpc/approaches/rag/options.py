"""Retrieval-augmented generation (Lewis et al. 2020, arXiv 2005.11401) over the passages of clients that keep them.

What a round does is in approaches/rag.py; here are its options.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fedhpc import registry
from fedhpc.approaches.reads import ALWAYS
from fedhpc.registry import Section


class Options(Section):
    reads = ALWAYS

    @property
    def fixes_rounds(self) -> str:
        return "they share out the questions of data.test, and other rounds would ask some twice"

    index: Literal["dense", "lexical", "hybrid"] = Field(
        "lexical", description="vectors of a sentence encoder, BM25, or the sum of both"
    )
    encoder: str | None = Field(None, min_length=1, description="sentence encoder: folder or hub id (dense, hybrid)")
    retriever: str | None = Field(None, min_length=1, description="RUN/adapter of a run of method retriever")
    adapter: str | None = Field(None, min_length=1, description="RUN/adapter of a run that customized the base")
    passage: str = Field("{text}", min_length=1, description="template over the columns of data.train")
    passage_id: str = Field("id", min_length=1, description="column of data.train with the name of a passage")
    query: str | None = Field(None, min_length=1, description="template of what is searched for; default data.prompt")
    gold: str | None = Field(None, min_length=1, description="column of data.test with the name of the right passage")
    chunk_words: int = Field(120, ge=1, description="longest piece of a passage that is indexed, in words")
    overlap_words: int = Field(20, ge=0, description="words that neighbouring pieces share")
    k: int = Field(5, ge=1, description="passages per question")
    candidates: int | None = Field(None, ge=1, description="passages that come up before rerank; default k")
    rerank: Literal["none", "likelihood"] = Field(
        "none", description="order of the candidates: as found, or by the base's likelihood of the question after them"
    )
    merge: Literal["score", "reciprocal_rank"] = Field(
        "score", description="how the clients' lists become one: by raw score, or by rank within a client"
    )
    per_client: int | None = Field(None, ge=1, description="most passages of one client per question")
    distinct: bool = Field(True, description="of passages with the same text keep one")
    route: int | None = Field(None, ge=1, description="ask only the clients with the closest centroids: how many")
    centroids: int = Field(1, ge=1, description="vectors by which a client is known to the router")
    k1: float = Field(1.2, ge=0, description="BM25: how soon repetitions of a term stop to count")
    b: float = Field(0.75, ge=0, le=1, description="BM25: how much longer chunks lose")
    lexical_weight: float = Field(0.02, ge=0, description="hybrid: what BM25 is multiplied by beside the cosine")
    context: str = Field("{passage}\n", description="template of a passage in front of the question")
    context_tokens: int = Field(160, ge=1, description="most tokens of passages in front of a question")

    def conflict(self, config: Any) -> str | None:
        """What a search cannot do."""
        if self.index == "lexical":
            for key in ("encoder", "retriever", "route"):
                if getattr(self, key) is not None:
                    return f"method.{key} is for vectors, which method.index lexical has not: use dense or hybrid"
        elif self.encoder is None:
            return f"method.index {self.index} needs method.encoder, the folder or hub id of a sentence encoder"
        if self.overlap_words >= self.chunk_words:
            return f"method.overlap_words {self.overlap_words} must be less than method.chunk_words {self.chunk_words}"
        if self.centroids != 1 and self.route is None:
            return f"method.centroids {self.centroids} are for a router: give method.route, or leave it out"
        if (self.candidates or self.k) < self.k:
            return f"method.candidates {self.candidates} is less than method.k {self.k}"
        if self.context_tokens >= config.data.max_length:
            return (
                f"method.context_tokens {self.context_tokens} leaves no room for the question in data.max_length "
                f"{config.data.max_length}"
            )
        if config.mode == "local":
            return (
                "mode local: every run of method rag says what clients find alone (own); use federated or centralized"
            )
        if config.mode == "federated" and config.partition.name == "virtual":
            return (
                "partition.name virtual draws a client's data anew where it is asked for, and method.name rag indexes "
                "every client: use natural, iid or another partition"
            )
        for metric in (*config.evaluation.metrics, *config.evaluation.metrics_of_test):
            if registry.choice("metrics", metric).needs == "labels":
                return (
                    f"evaluation.metrics: {metric} is of labels, and method.name rag answers in text: use exact_match, "
                    "f1, contains, recall or mrr"
                )
        return None
