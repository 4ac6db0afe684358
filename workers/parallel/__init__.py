"""One model over several ranks: who has which part, and how parts are added up again."""
