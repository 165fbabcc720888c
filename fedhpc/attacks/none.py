"""No attack: what is sent is what was trained."""

from __future__ import annotations

from fedhpc.attacks.base import Attack


class Nobody(Attack):
    """Leaves all updates as they are."""

    sees_others = False
