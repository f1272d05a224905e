"""Log lines: one line each, whatever the message holds."""

import json
import logging

import pytest

from web.logs import MAX_LINE, JsonFormatter, TextFormatter, one_line


def record(message: str, *args: object, exc_info=None) -> logging.LogRecord:
    return logging.LogRecord("web.test", logging.WARNING, __file__, 1, message, args, exc_info)


@pytest.mark.parametrize("text", ["a\r\nINFO forged", "a\x1b[31mred", "a\u2028b", "a\x00b"])
def test_nobody_writes_lines_of_his_own_into_the_log(text):
    line = TextFormatter().format(record("prompt %s", text))
    assert line.isprintable() and "web.test: prompt a" in line


def test_a_json_line_parses_and_has_its_fields():
    fields = json.loads(JsonFormatter().format(record("said %s", 'he "said"\n')))
    assert fields["level"] == "warning" and fields["logger"] == "web.test"
    assert fields["message"] == 'said he "said"\\n'


def test_a_line_has_a_limit():
    assert len(one_line("x" * 10 * MAX_LINE)) == MAX_LINE


def test_an_exception_is_told_in_the_same_line():
    try:
        raise RuntimeError("details")
    except RuntimeError as error:
        line = TextFormatter().format(record("failed", exc_info=(type(error), error, error.__traceback__)))
    assert "RuntimeError: details" in line and "\n" not in line
