"""Training of score networks: objectives, data, and what runs them under Lightning (the extra [train])."""
