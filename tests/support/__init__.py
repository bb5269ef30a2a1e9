"""What tests share: golden cases, tiny models, servers, terminals, browsers."""
