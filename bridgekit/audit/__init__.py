"""The first experiments, read and judged; nothing else imports it."""
