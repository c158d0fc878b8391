"""MLPerf's load generator on offcut: SingleStream, Offline and Server, like its text-to-image benchmark."""
