"""Looking inside a trained bridge."""
