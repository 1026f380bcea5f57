"""What a user sees when something is wrong: one line naming the setting, its value and the cure."""


class UserError(Exception):
    """A mistake in a setting or in the input; entry points print it on one line and exit with code 2."""
