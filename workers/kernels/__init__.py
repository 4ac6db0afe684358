"""The operations of a model's forward: their plain torch meaning, and a fast twin per device."""
