"""HTTP below the APIs: connections, the guard, request bodies, streaming, errors."""
