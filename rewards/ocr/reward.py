"""OCR: is the asked text written in the image? One minus the edit distance over the text's length
(Flow-GRPO's formula).

Target: metadata["text"], else the prompt's first span in double quotes, straight or typographic. Both sides
are compared in lower case and without spaces. The recogniser is passed in: `recogniser(images) -> list of
strings`, None where it failed on an image.
"""

import importlib.util
import re
import unicodedata

import torch

from rewards.errors import BadInput, RewardError
from rewards.ocr import engine
from rewards.tiny_world import glyphs

# Opening quotes, and what may close each of them, the likelier first.
QUOTES = {
    '"': '"”',
    "“": '”"“',
    "„": '“”"',
    "‟": '”"',
    "”": '”"',  # Swedish
    "«": "»",
    "»": "«",  # Danish
    "＂": '＂"',
    "「": "」",
    "『": "』",
}
# First words of the Unicode names of letters that PP-OCRv6 has in its dictionary.
READABLE_SCRIPTS = (
    "LATIN",
    "GREEK",
    "CJK",
    "HIRAGANA",
    "KATAKANA",
    "KATAKANA-HIRAGANA",
    "IDEOGRAPHIC",
    "FULLWIDTH",
    "HALFWIDTH",
    "FEMININE",  # the ordinals of Spanish
    "MASCULINE",
    "MICRO",
    "MODIFIER",  # the apostrophe of Hawaiian
)


def levenshtein(a, b):
    """Edit distance: fewest single-character insertions, deletions and substitutions between two strings."""
    row = list(range(len(b) + 1))  # distances of a's beginning to all beginnings of b
    for i, x in enumerate(a, start=1):
        diagonal = row[0]
        row[0] = i
        for j, y in enumerate(b, start=1):
            substitution = diagonal if x == y else diagonal + 1
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substitution)
    return row[-1]


def normalise(text):
    return text.replace(" ", "").lower()


def target_text(prompt, metadata):
    """The text that should be in the image. ValueError when the row names none."""
    text = metadata.get("text")
    if text is None:
        text = find_quoted(prompt)
    if text is None:
        raise ValueError('ocr needs a text in double quotes in the prompt, or "text" in the metadata')
    if not isinstance(text, str):
        raise ValueError(f'ocr: "text" must be a string, such as "text": "{text}", not {text!r}')
    if not normalise(text):
        raise ValueError("ocr: the text to write is empty")
    return text


def find_quoted(prompt):
    """The first span in double quotes, None where there is none.

    A straight quote right after a digit does not open a span, it is a mark of inches: in `a 12" box that says
    "X"` the span is X. It may close one, as in `a sign that says "Exit 12"`.
    """
    for start, character in enumerate(prompt):
        if character not in QUOTES:
            continue
        if character == '"' and start > 0 and prompt[start - 1].isdigit():
            continue
        for closing in QUOTES[character]:
            end = prompt.find(closing, start + 1)
            if end >= 0:
                return prompt[start + 1 : end]
    return None


def check_script(text):
    """Raises ValueError for a letter of a script that PP-OCR cannot read: the reward would never rise."""
    for character in text:
        name = unicodedata.name(character, "")
        script = name.split(" ")[0]
        if character.isalpha() and script not in READABLE_SCRIPTS:
            raise ValueError(
                f"ocr: the engine cannot read {character!r} ({name}) of {text!r}; it reads Latin, Greek, "
                "Chinese and Japanese letters"
            )


def text_score(recognised, target):
    """1 when the target is contained in what was read, else 1 - min(distance, length) / length, in [0, 1]."""
    recognised = normalise(recognised)
    target = normalise(target)
    if target in recognised:
        return 1.0
    distance = min(levenshtein(recognised, target), len(target))
    return 1 - distance / len(target)


class OCR:
    """The reward. A row that the recogniser failed on is NaN; an image where it finds no text is a true 0."""

    def __init__(self, recogniser):
        self.recogniser = recogniser

    def check(self, prompt, metadata):
        text = target_text(prompt, metadata)
        if isinstance(self.recogniser, engine.Reader):
            check_script(text)

    def __call__(self, images, prompts, metadata):
        return self.start_scoring(images, prompts, metadata)()

    def start_scoring(self, images, prompts, metadata):
        """Begins to read the images. Returns a function that waits for the scores.

        The engine goes on reading in processes of its own. The tiny world's reader is through when this
        returns.
        """
        if isinstance(self.recogniser, engine.Reader):
            wait_for_texts = self.recogniser.start_reading(images)
        else:
            texts_read = self.recogniser(images)

            def wait_for_texts():
                return texts_read

        device = images.device

        def wait_for_scores():
            try:
                texts = wait_for_texts()
            except engine.EngineError as error:
                raise RewardError(f"ocr: {error}") from None
            scores = []
            for text, prompt, row in zip(texts, prompts, metadata):
                score = float("nan") if text is None else text_score(text, target_text(prompt, row))
                scores.append(score)
            return torch.tensor(scores, dtype=torch.float32, device=device)

        return wait_for_scores


def make_ocr(metadata, device):
    """Reads with the tiny world's own reader where every row asks for its writing, else with PP-OCR."""
    if all(is_tiny_world(row) for row in metadata):
        return OCR(glyphs.read)
    for package in ("rapidocr", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"ocr needs the package {package}: pip install rapidocr onnxruntime")
    return OCR(engine.Reader())


def is_tiny_world(row):
    """Whether a metadata row asks for a text that the tiny world's alphabet can write."""
    text = row.get("text")
    return row.get("tag") == "text" and isinstance(text, str) and bool(re.fullmatch("[A-Z0-9]{2,3}", text))
