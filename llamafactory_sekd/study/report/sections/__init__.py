"""The report's sections, by subject. Each module's ``sections`` returns those that the study has something for."""
