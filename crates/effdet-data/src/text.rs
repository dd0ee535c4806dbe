//! Names from data, made safe to print.

use std::fmt::Write as _;

/// Whether a character is unseen and acts on what surrounds it: control characters, and those that turn or hide text.
pub fn is_hidden(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// Text for a terminal: hidden characters become visible, so that a name cannot move the cursor or pose as another.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match is_hidden(character) {
            true => {
                write!(out, "\\u{{{:x}}}", u32::from(character)).expect("writing to a string does not fail");
            }
            false => out.push(character),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_and_turned_text_become_visible() {
        assert_eq!(printable("a\u{1b}]0;x\u{7}\nb"), "a\\u{1b}]0;x\\u{7}\\u{a}b");
        assert_eq!(printable("gpj.\u{202e}exe"), "gpj.\\u{202e}exe");
        assert_eq!(printable("Café 自行车"), "Café 自行车");
    }
}
