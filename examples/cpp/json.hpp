// Reads the JSON of a file's metadata: objects, lists, text and numbers.
#pragma once
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace json {

struct Value {
  std::map<std::string, Value> entries;  // of an object
  std::vector<Value> items;              // of a list
  std::string text;
  double number = 0;

  const Value& at(const std::string& name) const {
    const auto found = entries.find(name);
    if (found == entries.end()) throw std::runtime_error("the file's metadata has no entry " + name);
    return found->second;
  }
};

class Reader {
 public:
  explicit Reader(const std::string& source) : source_(source) {}

  Value value() {
    switch (next()) {
      case '{':
        return object();
      case '[':
        return list();
      case '"':
        return text();
      default:
        return word();
    }
  }

 private:
  char next() {
    place_ = source_.find_first_not_of(" \t\r\n", place_);
    if (place_ == std::string::npos) throw std::runtime_error("the file's metadata ends too early");
    return source_[place_];
  }

  // Steps over `wanted` if it is next.
  bool skip(char wanted) {
    if (next() != wanted) return false;
    ++place_;
    return true;
  }

  void require(char wanted) {
    if (!skip(wanted)) throw std::runtime_error(std::string("the file's metadata lacks a ") + wanted);
  }

  Value object() {
    Value found;
    require('{');
    while (!skip('}')) {
      const std::string name = text().text;
      require(':');
      found.entries[name] = value();
      skip(',');
    }
    return found;
  }

  Value list() {
    Value found;
    require('[');
    while (!skip(']')) {
      found.items.push_back(value());
      skip(',');
    }
    return found;
  }

  Value text() {
    Value found;
    require('"');
    while (place_ < source_.size() && source_[place_] != '"') {
      const char letter = source_[place_++];
      if (letter == '\\') {
        append_escaped(found.text);
      } else {
        found.text += letter;
      }
    }
    require('"');
    return found;
  }

  void append_escaped(std::string& out) {
    const char letter = source_.at(place_++);
    if (letter == 'u') {
      append_utf8(out, code_unit());
      return;
    }
    const std::string letters = "nrtbf", meanings = "\n\r\t\b\f";
    const size_t index = letters.find(letter);
    out += index == std::string::npos ? letter : meanings[index];
  }

  unsigned long code_unit() {
    const std::string digits = source_.substr(place_, 4);
    place_ += 4;
    const unsigned long unit = std::strtoul(digits.c_str(), nullptr, 16);
    const bool high_surrogate = unit >= 0xD800 && unit < 0xDC00 && source_.compare(place_, 2, "\\u") == 0;
    if (!high_surrogate) return unit;
    place_ += 2;
    return 0x10000 + ((unit - 0xD800) << 10) + (code_unit() - 0xDC00);
  }

  static void append_utf8(std::string& out, unsigned long point) {
    if (point < 0x80) {
      out += char(point);
    } else if (point < 0x800) {
      out += char(0xC0 | (point >> 6));
      out += char(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
      out += char(0xE0 | (point >> 12));
      out += char(0x80 | ((point >> 6) & 0x3F));
      out += char(0x80 | (point & 0x3F));
    } else {
      out += char(0xF0 | (point >> 18));
      out += char(0x80 | ((point >> 12) & 0x3F));
      out += char(0x80 | ((point >> 6) & 0x3F));
      out += char(0x80 | (point & 0x3F));
    }
  }

  // A number, true, false or null; anything else counts as 0.
  Value word() {
    Value found;
    const size_t end = source_.find_first_of(",]} \t\r\n", place_);
    const std::string letters = source_.substr(place_, end - place_);
    if (letters.empty()) throw std::runtime_error("the file's metadata is not JSON");
    found.number = std::strtod(letters.c_str(), nullptr);
    place_ = end;
    return found;
  }

  const std::string& source_;
  size_t place_ = 0;
};

}  // namespace json
