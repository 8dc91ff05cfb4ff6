"""Configure Django: ``base`` reads the environment, ``test`` changes what tests need."""
