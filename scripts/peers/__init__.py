"""Other engines beside our artefacts: a dense twin of the shipped model through each, timed and judged."""
