"""What the documentation claims, measured: each study is a list of runs, and each run's figures are one JSON file."""
