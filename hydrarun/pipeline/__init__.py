"""From a request to pictures: stages, state, guidance, and the libraries' components."""
