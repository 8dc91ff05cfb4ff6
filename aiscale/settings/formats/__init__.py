"""Write moments the same way everywhere that Django writes them, such as in the admin."""
