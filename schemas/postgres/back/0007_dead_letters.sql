-- Undoes 0007.
DROP TABLE dead_letters;
