"""Parts of a run before it trains: its directory, its models, and where it begins."""
