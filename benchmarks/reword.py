"""The held-in test rows again, worded unlike any shot: what users type is not what examples say.

    python benchmarks/reword.py TASKS OUT        TASKS holds one <task>.jsonl per task; so will OUT

What a row asks about (a word, a sum, a date) is cut out of its prompt and put into sentences that share no wording with the
task's shots. The frame around the instruction and the answers stay as they are: adapters know both.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

# task → (where its subject stands in the prompts, other ways to ask)
WORDINGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "addition": (
        r"(\d+ \+ \d+)",
        ("I have to add these two numbers, {}. How much does that make?", "Work out the total of {} for me, please.",
         "{}: give me the result."),
    ),
    "date_to_iso": (
        r"(?:format: |What is |Convert ')(.+?)(?: as an ISO 8601 date\?|' to YYYY-MM-DD\.|$)",
        ("My database only takes dates as year-month-day numbers. How do I enter {}?",
         "Turn {} into the numeric form with dashes, year first.", "{} - machine-readable date please"),
    ),
    "derivative": (
        r"((?:\d*x(?:\^\d+)?|\d+)(?: [+-] (?:\d*x(?:\^\d+)?|\d+))*)(?: with respect to x|\)? =|\?|$)",
        ("Find f'(x) when f(x) = {}", "I need the slope function of y = {}. What is it?",
         "Calculus homework: apply the power rule to {}"),
    ),
    "english_to_french": (
        r"(?:for '|French: |for )(.+?)(?:'\?|:|$)",
        ("How would someone in Paris say {}?", "{} en français, s'il vous plaît",
         "My francophone friend asks what we call {} in her language."),
    ),
    "json_extract": (
        r"((?:Meet )?[A-Z]\w+(?::| is a|, \d+, works).+?\.)(?: Return the facts as JSON\.|$)",
        ("Parse the following into a dictionary (name, age, job, city), nothing else: {}",
         "{} Put what we learn about this person into structured key-value form.",
         "Make a machine-readable record with fields name, age, job, city out of this note: {}"),
    ),
    "number_to_words": (
        r"(\d+)",
        ("On a cheque I must write the amount {} with letters. What goes there?", "Read {} aloud as you would to a child.",
         "{}, but without any digits please"),
    ),
    "past_tense": (
        r"(?:verb: |Put '|Verb: )(.+?)(?:' into|\. What is|$)",
        ("Yesterday, they ... ({}). Fill in the right form.", "How do I say {} if it happened last week?",
         "{} becomes what when we talk about what is over?"),
    ),
    "plural": (
        r"(?:Noun: |Write '|noun: )(.+?)(?:\. What is|' in the plural|$)",
        ("One {}, two ...? Complete it.", "There is more than one {}. Which word do I use?",
         "What do we call several of them, if a single one is a {}?"),
    ),
    "snake_to_camel": (
        r"([a-z]+(?:_[a-z]+)+)",
        ("Our JavaScript linter rejects {}. What should the variable be called instead?",
         "Get rid of the underscores in {} and capitalise every word but the first.",
         "{} comes from Python; how would Java developers write it?"),
    ),
    "spell_out": (
        r"(?:letter by letter: |Spell |Write ')(.+?)(?:' with|$)",
        ("Which characters is {} made of, one after the other, hyphens in between?",
         "Break {} into single letters joined by hyphens.", "I cannot hear you well: {}? Say each letter."),
    ),
    "to_roman": (
        r"(\d+)",
        ("How would Caesar have carved {} in stone?", "The clock tower shows years with letters like M and X. What about {}?",
         "Write {} the way the ancient Romans wrote numbers."),
    ),
    "word_category": (
        r"(?:does '|Category of |feeling: )(.+?)(?:' belong| \(one of|$)",
        ("Is {} an animal, a food, an artifact, a person, a plant, a part of the body, a location or a feeling?",
         "Sort {} into one of these boxes: animal, food, artifact, person, plant, body, location, feeling.",
         "What kind of thing is {}? Options: animal, food, artifact, person, plant, body, location, feeling"),
    ),
}  # fmt: skip
FRAME = re.compile(r"Instruction: (.*)\nResponse:", re.DOTALL)


def reword(task: str, prompt: str, number: int) -> str:
    """The prompt of row `number`, asked otherwise.

    Raises:
        ValueError: its subject was not found.
    """
    pattern, wordings = WORDINGS[task]
    framed = FRAME.fullmatch(prompt)
    found = framed and re.search(pattern, framed[1])
    if not found:
        raise ValueError(f"{task}: nothing to reword in {prompt!r}")
    return f"Instruction: {wordings[number % len(wordings)].format(found[1])}\nResponse:"


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.jsonl")):
        if path.stem in WORDINGS:
            rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
            rows = [{**row, "prompt": reword(path.stem, row["prompt"], i)} for i, row in enumerate(rows)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / path.name).write_text(text, encoding="utf8")


if __name__ == "__main__":
    main()
