"""guestd and its peers on real load: `slow` on 5-minute samples, `fast` on samples of seconds."""
