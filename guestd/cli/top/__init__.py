"""`guestctl top`: the host and its guests, live, on the whole terminal.

`feed` follows the broker and keeps the `Board`, what is known now; `columns`, `bars` and `detail` are pure
functions from that to text; `table` and `app` are the widgets of textual.
"""
