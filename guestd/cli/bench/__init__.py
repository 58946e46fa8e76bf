"""`guestctl bench`: how fast the VM follows its load, and what the guest daemon costs, both measured in a real VM.

`run` puts it together, `session` is the course, `report` judges and prints. The programs that run in the
guest (`guest_*`) use Python's standard library alone, but for `guest_bare`, which is what guestd is compared with.
"""
