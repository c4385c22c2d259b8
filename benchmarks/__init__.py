"""What accumulating costs, measured beside plain tf_keras: see README.md in this folder."""
