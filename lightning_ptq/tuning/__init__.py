"""AdaQuant: tuning units against the float network."""
