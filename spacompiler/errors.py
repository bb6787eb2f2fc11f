"""The one error that users see: what is wrong, where, why, and what to do about it.

>>> str(SpaError("unknown pass 'taylr'", where="--importance", fix="did you mean 'taylor'?"))
"unknown pass 'taylr'\\n  where: --importance\\n  what to do: did you mean 'taylor'?"
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

WORD = 400
"""Letters of the longest word that a message repeats."""


class SpaError(Exception):
    """A failure that is not a bug of ours; the command line prints it and exits with `code`."""

    code = 1

    def __init__(self, what: str, where: str = "", why: str = "", fix: str = "") -> None:
        what, where, why, fix = map(shortened, (what, where, why, fix))
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        rows = [("where", self.where), ("why", self.why), ("what to do", self.fix)]
        return "\n".join([self.what, *(f"  {label}: {text}" for label, text in rows if text)])


class UsageError(SpaError):
    """The request itself is malformed (unknown name, impossible option): exit code 2."""

    code = 2


class WeightsError(SpaError):
    """Stored weights are not those of the network: missing, left over, mis-shaped, not finite."""


class TraceError(SpaError):
    """The network cannot be traced as a whole; a part of it may be."""


class TargetError(SpaError):
    """The target cannot be met; `why` names the constraint that binds."""


class ProofError(SpaError):
    """The pruned model is not the masked dense model: nothing may be written."""


class ControlError(ProofError):
    """The proof shows nothing at these inputs: a wrong index goes unseen."""


class ElsewhereError(SpaError):
    """Another process of the run failed or is gone; what is wrong was said there."""


def shortened(text: str) -> str:
    """Cut very long words in a message, such as a name of thousands of letters.

    >>> len(shortened("x" * 5000)), shortened("a word")
    (95, 'a word')
    """
    if len(text) <= WORD:
        return text
    return re.sub(rf"\S{{{WORD},}}", lambda found: f"{found[0][:60]}... ({len(found[0])} "
                  "characters) ..." + found[0][-10:], text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for a misspelt name, followed by all known names.

    >>> did_you_mean("taylr", ["magnitude", "taylor"])
    "did you mean 'taylor'? known: magnitude, taylor"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
