"""Runs the docstring examples of modules as if each were pasted in a new session.

In float32, with a namespace and print options of its own; run by test_examples.py as
``python examples.py MODULE…``.
"""

import doctest
import importlib
import sys

import jax
import numpy as np


def main(names: list[str]) -> int:
    assert not jax.config.jax_enable_x64
    failed = total = 0
    options = np.get_printoptions()
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in names:
        for test in finder.find(importlib.import_module(name), globs={}):
            if test.examples:
                test.globs = {"__name__": "__main__"}
                np.set_printoptions(**options)
                runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
                failed += runner.run(test).failed > 0
                total += 1
    print(f"{total} examples, {failed} fail")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
