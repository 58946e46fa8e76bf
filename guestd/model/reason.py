"""Why something is so: for people and for programs."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reason:
    """Why, in a word that never changes (`code`) and in a sentence with numbers (`text`)."""

    code: str
    text: str
