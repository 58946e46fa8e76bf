"""The demo: one real VM whose CPUs and memory follow its load, measured by three independent views.

`run` does it, `timeline` holds what was seen, `verify` judges it, `svg` draws it, `display` shows it live.
`scripts/` are the two programs that run in the guest; they know nothing of guestd.
"""
