"""MLPerf's load generator on offcut: SingleStream, Offline and Server in the shape of its text-to-image benchmark."""
