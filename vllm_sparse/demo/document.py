# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A long document with facts hidden in it, and questions about them.

The document is the made-up log book of a mountain observatory. It is assembled from a fixed set
of sentences without any randomness: every run, on every machine, reads the same text.
"""

from __future__ import annotations

from dataclasses import dataclass

DAYS = 86

WEATHER = (
    "The morning was clear and cold, with a light wind from the west",
    "Low cloud filled the valley until noon and then lifted slowly",
    "Snow fell through the night and the path to the dome had to be cleared by hand",
    "A dry wind blew dust across the terrace all afternoon",
    "Fog came up from the lake in the evening and stayed",
    "The air was still and the sky was free of haze",
    "Thunder was heard behind the ridge but no rain reached us",
)
WORK = (
    "We cleaned the mirror of the small telescope and put the cover back before dusk",
    "The drive of the dome was greased, and the rail was checked for cracks",
    "Two lamps in the library were replaced and the old wiring was taken out",
    "The batteries were tested one by one, and the weakest was set aside",
    "The roof of the workshop was painted again where the sun had lifted the colour",
    "A carpenter came up from the village and repaired the stairs to the terrace",
    "The water tank was emptied, scrubbed and filled from the spring",
    "The photographic plates of the last winter were sorted and packed in boxes",
    "The shelves in the store room were moved away from the damp wall",
)
OBSERVATIONS = (
    "During the night the comet was followed for two hours before it sank behind the trees",
    "Jupiter stood high, and its moons were drawn at the eyepiece by both assistants",
    "The double star in the Swan was measured again, with the same result as last year",
    "No observation was possible, so the night was used for reading and for reckoning",
    "A bright meteor crossed the northern sky and left a trail that lasted several breaths",
    "The edge of the Moon was sharp, and the shadows in the craters were easy to sketch",
    "The variable star in the Whale had grown fainter and was hard to find",
    "The light of the town was stronger than usual and spoiled the faint nebulae",
)
VISITORS = (
    "A school class visited and asked many questions about the rings of Saturn",
    "The postman brought letters, a parcel of books and fresh bread",
    "An engineer from the railway stayed for supper and told stories of the great tunnel",
    "Nobody came up the road, and the only guests were the ravens",
    "The keeper of the mountain hut sent a basket of apples and a friendly note",
    "A painter set up his easel on the terrace and worked until the light was gone",
)
CLOSINGS = (
    "Supper was soup and cheese, and the fire was kept burning until late",
    "The log was closed at midnight and the lamps were put out",
    "All instruments were covered and the doors were locked as usual",
    "The night watch passed without anything worth noting",
    "Everyone went to bed early, for the next day promised to be long",
)

# Keeps the model talking, which the speed measurement needs.
SUMMARY_TASK = "Write a summary of the log book."


@dataclass(frozen=True)
class Fact:
    """One fact, where it is hidden, and how to ask for it.

    Attributes:
        depth: Position in the document, from 0 (its start) to 1 (its end).
    """

    sentence: str
    question: str
    answer: str
    depth: float


FACTS = (
    Fact(
        sentence="The maintenance code of the north gate is 7391.",
        question="What is the maintenance code of the north gate?",
        answer="7391",
        depth=0.5,
    ),
    Fact(
        sentence="The old telescope was sold to a museum in Vienna.",
        question="Where was the old telescope sold to?",
        answer="Vienna",
        depth=0.3,
    ),
)


def build_document() -> str:
    """Returns the log book with all `FACTS` in it: about 81 SmolLM2 tokens a day."""
    hidden = {int(DAYS * fact.depth): fact.sentence for fact in FACTS}
    paragraphs = []
    for day in range(1, DAYS + 1):
        paragraphs.append(_entry(day))
        if day in hidden:
            paragraphs.append(hidden[day])
    return "\n\n".join(paragraphs)


def first_message(task: str) -> str:
    """Returns the chat message that holds the document and a task, such as a question."""
    return (
        "Here is a log book. Read it and answer the question after it.\n\n"
        f"{build_document()}\n\n"
        f"Question: {task}"
    )


def _entry(day: int) -> str:
    """Returns one day's entry. The different step widths keep neighbouring entries different."""
    return (
        f"Day {day}. {WEATHER[day * 3 % len(WEATHER)]}. {WORK[day * 4 % len(WORK)]}. "
        f"{OBSERVATIONS[day * 3 % len(OBSERVATIONS)]}. {VISITORS[day * 5 % len(VISITORS)]}. "
        f"{CLOSINGS[day * 2 % len(CLOSINGS)]}."
    )
