"""The parts of the command-line client: the HTTP API as a class, and what people see. Nothing of the project's."""
