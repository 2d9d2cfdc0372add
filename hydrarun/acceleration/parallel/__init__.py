"""Many ranks on one picture: every method is written once, on the contract, and knows no model."""
