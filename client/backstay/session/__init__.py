"""One session of one rank with its daemon, joined and attached again in one place for every client."""
