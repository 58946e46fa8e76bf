"""Estimators of need, guestd's and its peers', on made-up loads whose truth is known."""
