"""``offcut bench mlperf``: MLPerf's load generator in its scenarios SingleStream, Offline and Server."""
