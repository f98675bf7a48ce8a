"""The held-in test rows again, worded unlike any shot: what users type is not what examples say.

    python benchmarks/reword.py TASKS OUT [curt]        TASKS holds one <task>.jsonl per task; so will OUT

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
# Curter and more figurative: task → other ways to ask. Written without the shots in view.
CURT: Mapping[str, tuple[str, ...]] = {
    "addition": (
        "Sum of {}, quickly!", "I bought two things; the prices are {}. What do I pay altogether?", "{} makes how much",
        "Could you tally {} and tell me the answer?", "Please compute the following expression: {}",
        "If I put {} together, what number do I get?", "my calculator broke, {} ?", "Evaluate {}",
    ),
    "date_to_iso": (
        "The form wants digits only, like a timestamp: {}", "Standardise this day for a spreadsheet column: {}",
        "{} -> sortable date", "I need {} written the way computers like it",
        "How is {} noted with four-digit year, two-digit month and two-digit day?", "Normalise the following date string: {}",
        "Rewrite {} so that files sort by day", "Give me the calendar day {} in international numeric notation",
    ),
    "derivative": (
        "How fast does {} change as x changes?", "d/dx of {}", "Differentiate: {}",
        "We have the polynomial {}. Take its first-order differential.", "tangent gradient for y = {} ?",
        "My maths teacher wants the rate of change of {}", "g(x) = {}; g prime is", "Compute the gradient of the curve {}",
    ),
    "english_to_french": (
        "I am travelling to Lyon. What word should I use for {}?", "Translate {} for a Québécois customer",
        "Please put {} into Molière's language", "{} (fr)?", "What's the French dictionary entry for {}?",
        "My teacher asked for the equivalent of {} in français", "Say {} as a native of Marseille would",
        "which French noun means {}",
    ),
    "json_extract": (
        "Turn this into JSON: {}", "{} Now give me that as a data object.", "Extract the fields and serialise them. Text: {}",
        "As key/value pairs, please. {}", "I am filling a personnel database. Source sentence: {}",
        "Read: {} Output the person's details so that a program can load them.", "{} (structured output)",
        "Convert this biography line to an object literal: {}",
    ),
    "number_to_words": (
        "How is {} pronounced?", "Write out {} for a bank draft", "Express the figure {} verbally", "{} in plain English words",
        "Say the number {} to me over the phone", "Spell the quantity {} as words, no numerals",
        "The contract must state {} in letters too. What do I put?", "Please verbalise {}",
    ),
    "past_tense": (
        "I {} today; yesterday I did what?", "Preterite of {}?", "Conjugate {} for something already finished",
        "Which form of {} would a history book use?", "Turn the verb {} into the simple past", "{} -> -ed form or irregular",
        "Last year he (to {}) a lot. Correct form?", "Give the second principal part of {}",
    ),
    "plural": (
        "Make {} many", "I have one {} and then get another. Now I have two what?", "Pluralise {}",
        "How does the word {} change for a group of them?", "{} x 5 = five ...",
        "Which ending does {} take when counting several?", "a box full of {}, correct form please",
        "Not a single {} but lots of ...",
    ),
    "snake_to_camel": (
        "Convert {} to lower camel case", "Rename the Python identifier {} for TypeScript", "{} -> humpBack",
        "Our style guide forbids underscores. What happens to {}?", "Reformat this identifier for Swift: {}",
        "JSON keys must be camelised: {}", "Transform the variable {} so that words run together with inner capitals",
        "port {} to JS naming",
    ),
    "spell_out": (
        "Give me the letters in {} separated by dashes", "What's the spelling of {}?", "Dictate {} one letter at a time",
        "Hyphenate every character in {}", "{} as s-e-p-a-r-a-t-e letters",
        "How would a spelling bee contestant answer for {}?", "Split {} up into its letters",
        "I'm writing {} down, read the characters to me",
    ),
    "to_roman": (
        "Convert the decimal {} to Latin numerals", "{} using I, V, X, L, C, D, M",
        "What would be chiselled on a Roman monument for {}?", "The film credits show the year {} how?",
        "Chapter {} in old style numbering", "Encode {} as a legionary would", "Represent {} with letters of the Roman system",
        "which numeral did Romans use for {}",
    ),
    "word_category": (
        "Classify {}: animal, food, artifact, person, plant, body, location or feeling?", "A {} is a type of what?",
        "Under which heading would an encyclopedia file {}?", "Tag the noun {} with its semantic class",
        "Is {} something alive, a place, an emotion, or an object? Use one label.", "{} belongs to which group?",
        "Choose the label that suits {}", "ontology class for {}",
    ),
}  # fmt: skip
FRAME = re.compile(r"Instruction: (.*)\nResponse:", re.DOTALL)


def reword(task: str, prompt: str, number: int, curt: bool = False) -> str:
    """The prompt of row `number`, asked otherwise; in the words of `CURT`, where these are wanted.

    Raises:
        ValueError: its subject was not found.
    """
    pattern, wordings = WORDINGS[task]
    framed = FRAME.fullmatch(prompt)
    found = framed and re.search(pattern, framed[1])
    if not found:
        raise ValueError(f"{task}: nothing to reword in {prompt!r}")
    wordings = CURT[task] if curt else wordings
    return f"Instruction: {wordings[number % len(wordings)].format(found[1])}\nResponse:"


def main() -> None:
    source, out = map(Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.jsonl")):
        if path.stem in WORDINGS:
            rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
            rows = [
                {**row, "prompt": reword(path.stem, row["prompt"], i, sys.argv[3:] == ["curt"])} for i, row in enumerate(rows)
            ]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (out / path.name).write_text(text, encoding="utf8")


if __name__ == "__main__":
    main()
