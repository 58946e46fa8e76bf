"""Other people's ways to decide how much each VM of a host gets, one file each, for the scoreboard."""
