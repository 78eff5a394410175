"""From a job to what starts it elsewhere: files and command lines, by functions that only render."""
