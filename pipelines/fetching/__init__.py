"""Images by URI: fetched within a policy and within bounds."""
