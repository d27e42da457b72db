"""Weights that ship with FedSeg; `demo.md` says what they are and aren't for.

A package of its own: an app bundle brings its own `fedseg`, without files that aren't code, and
that one hides the installed one.
"""
