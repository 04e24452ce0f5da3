"""Looks for gradients that are wrong without a word: random problems, dense answers.

``maps`` has the step functions, ``draws`` the random settings and problems, ``solving``
what a user would run on them, ``oracle`` the dense answers, ``verdicts`` what is
counted, ``experiment`` the command.
"""
