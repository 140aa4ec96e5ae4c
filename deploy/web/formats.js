// Numbers, times and sizes as people read them.

const NUMBER = new Intl.NumberFormat("en");
const DAY = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "short" });
const CLOCK = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

export const count = (value) => (value === null || value === undefined ? "–" : NUMBER.format(Math.round(value)));
export const loss = (value) => (value === null || value === undefined ? "–" : value.toFixed(4));
export const percent = (share) => `${Math.round(100 * share)}%`;
export const day = (seconds) => DAY.format(seconds * 1000);
export const clock = (seconds) => CLOCK.format(seconds * 1000);

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value < 10 && unit ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

export function ago(seconds) {
  const passed = Date.now() / 1000 - seconds;
  if (passed < 10) return "just now";
  if (passed < 86400) return `${duration(passed).replace(/ min \d+ s$/, " min")} ago`;
  return day(seconds);
}
