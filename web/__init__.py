"""HTTP: routes, schemas, errors, streams. Flask only, no torch."""
