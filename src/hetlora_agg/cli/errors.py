"""What a command ends with when it was understood and could not be carried out."""


class Failure(Exception):
    """The command was understood and could not be carried out."""
