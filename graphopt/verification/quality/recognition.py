"""Recognisers of text that give a score for each character at each step (CTC): how many characters change?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, VerificationError
from graphopt.verification.quality.metrics import Metric, Quality, counted, mean
from graphopt.verification.quality.runs import Array, Batch


class RecognitionMeasure:
    """The character error rate (CER): edits that make one text of the other, over the characters of the right one.

    Args:
        output: The output of scores [batch, steps, characters].
        characters: What each class but the blank writes, in the order of the classes; None: texts are compared by
            their classes.
        truths: The text of each sample in order; None: the reference's texts are taken for the truth.
        blank: The class that writes nothing; None: the first or the last one, whichever the reference chooses more
            often in the first batch.
        ignore_spaces: Leave spaces out of both sides.
    """

    def __init__(
        self,
        output: str,
        characters: Sequence[str] | None = None,
        truths: Sequence[str] | None = None,
        blank: int | None = None,
        ignore_spaces: bool = False,
    ) -> None:
        if truths is not None and characters is None:
            raise InputDataError("To compare with the true texts, the characters of the model's classes must be known.")
        self._output, self._characters, self._truths = output, characters, truths
        self._blank, self._ignore = blank, ignore_spaces
        self._samples = self._true_length = self._length = 0
        self._edits = [0, 0, 0]

    def add(self, feeds: Batch, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """See `Measure`.

        Raises:
            VerificationError: Another number of classes.
            InputDataError: More classes than characters, or more samples than texts.
        """
        a, b = expected[self._output], found[self._output]
        if a.shape[0] != b.shape[0] or a.shape[-1] != b.shape[-1] or a.ndim != 3:
            raise VerificationError(
                f"The models can't be judged: the output {self._output!r} has the shape {list(b.shape)} in the "
                f"candidate and {list(a.shape)} in the reference; it must be [batch, steps, characters]."
            )
        if self._blank is None:
            classes = a.argmax(axis=2)
            self._blank = 0 if (classes == 0).sum() >= (classes == a.shape[2] - 1).sum() else a.shape[2] - 1
        for first, second in zip(a, b, strict=True):
            ours, theirs = self._read(first), self._read(second)
            self._length += len(ours)
            self._edits[2] += edits(ours, theirs)
            if self._truths is not None:
                if self._samples >= len(self._truths):
                    raise InputDataError(f"There are {len(self._truths)} true texts for more samples than that.")
                truth = list(self._truths[self._samples])
                truth = [c for c in truth if not c.isspace()] if self._ignore else truth
                self._true_length += len(truth)
                self._edits[0] += edits(truth, ours)
                self._edits[1] += edits(truth, theirs)
            self._samples += 1

    def quality(self) -> Quality:
        """See `Measure`."""
        change = mean(self._edits[2], self._length)
        title = "character errors against the original's text"
        if self._truths is None:
            metrics = [Metric("cer", title, "lower", change, 0.0, scale="share")]
            length = self._length
        else:
            rates = [mean(edits, self._true_length) for edits in self._edits[:2]]
            metrics = [
                Metric("cer", "character errors", "lower", rates[1], rates[0], scale="share"),
                Metric("change", title, "lower", change, scale="share"),
            ]
            length = self._true_length
        samples = f"{counted(length, 'character')} in {counted(self._samples, 'sample')}"
        notes = ("Spaces are left out.",) if self._ignore else ()
        return Quality("recognition", tuple(metrics), samples, notes)

    def _read(self, scores: Array) -> list[str]:
        """The characters of one sample [steps, characters]."""
        assert self._blank is not None
        classes = ctc(scores, self._blank)
        if self._characters is None:
            return [chr(number) for number in classes]
        # The blank has no character; the classes behind it move up.
        places = [number - (number > self._blank) for number in classes]
        if places and max(places) >= len(self._characters):
            raise InputDataError(
                f"The model writes a character of class {max(places)}, and only {len(self._characters)} are known."
            )
        text = [self._characters[place] for place in places]
        return [c for c in text if not c.isspace()] if self._ignore else text


def ctc(scores: Array, blank: int) -> list[int]:
    """The classes that scores [steps, classes] spell: the best of each step, repeated ones once, without the blank."""
    best = scores.argmax(axis=1)
    new = np.ones(len(best), dtype=np.bool_)
    new[1:] = best[1:] != best[:-1]
    return [int(number) for number in best[new & (best != blank)]]


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """The Levenshtein distance: the fewest insertions, deletions and replacements that make one of the other."""
    if len(a) < len(b):
        a, b = b, a
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(c, len(numbers)) for c in b], dtype=np.int64)
    steps = np.arange(len(b) + 1)
    row: npt.NDArray[np.int64] = steps.copy()
    for index, character in enumerate(a, 1):
        replaced = row[:-1] + (codes != numbers.get(character, -1))
        best = np.concatenate([[index], np.minimum(replaced, row[1:] + 1)])
        # An insertion costs 1 more than the place before: the running minimum of what lies `steps` below.
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])
