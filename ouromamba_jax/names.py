"""What a misspelt name was meant to be."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The question that offers the nearest of `names`, at most three; "" where none is near, or `name` is a path.

    Examples:
      >>> from ouromamba_jax.names import did_you_mean
      >>> did_you_mean("Vim-Tinny", ("vim_tiny", "vim_base", "digits"))
      'did you mean vim_tiny?'
    """
    close = [] if "/" in name else difflib.get_close_matches(name.lower(), names, n=3)
    return f"did you mean {', '.join(close)}?" if close else ""
