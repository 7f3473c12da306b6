"""What a run is made of before it trains: its directory, its models, and where it begins."""
