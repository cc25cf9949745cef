"""The claim study: small models trained from scratch under equal budgets, their evaluation and the page."""
