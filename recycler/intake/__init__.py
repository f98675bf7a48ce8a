"""Finding and fetching: from a name on the Hub to an adapter in the zoo."""
