//! The proleptic Gregorian calendar: seconds since 1970 and back.

/// Seconds in a day.
const DAY: i64 = 86_400;

/// A date and time of day.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: i64,
    /// 1 to 12.
    pub(super) month: i64,
    /// 1 to 31.
    pub(super) day: i64,
    /// 1 for Sunday to 7.
    pub(super) weekday: i64,
    pub(super) hour: i64,
    pub(super) minute: i64,
    pub(super) second: i64,
}

impl DateTime {
    /// From seconds since 1970-01-01 00:00.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
        // Years that begin in March, in cycles of 400 (146097 days): a leap day is the last day of its year.
        let shifted = days + 719_468;
        let (cycle, day) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let in_next_year = i64::from(month >= 10);
        Self {
            year: 400 * cycle + year + in_next_year,
            month: month + 3 - 12 * in_next_year,
            day: day - (153 * month + 2) / 5 + 1,
            weekday: (days + 4).rem_euclid(7) + 1,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
        }
    }

    /// Seconds since 1970-01-01 00:00; the day of the week does not count. A day past the end of its month is one of
    /// the next month.
    pub(super) fn seconds(&self) -> i64 {
        let before_march = i64::from(self.month <= 2);
        let year = self.year - before_march;
        let (cycle, year) = (year.div_euclid(400), year.rem_euclid(400));
        let month = self.month - 3 + 12 * before_march;
        let day = (153 * month + 2) / 5 + self.day - 1;
        let days = 146_097 * cycle + 365 * year + year / 4 - year / 100 + day - 719_468;
        days * DAY + self.hour * 3600 + self.minute * 60 + self.second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        let cases = [
            (0, (1970, 1, 1, 5)),
            (951_782_400, (2000, 2, 29, 3)),
            (1_709_164_800, (2024, 2, 29, 5)),
            (4_107_542_400, (2100, 3, 1, 2)),
            (-1, (1969, 12, 31, 4)),
        ];
        for (seconds, (year, month, day, weekday)) in cases {
            let date = DateTime::from_seconds(seconds);
            assert_eq!((date.year, date.month, date.day, date.weekday), (year, month, day, weekday));
        }
    }

    #[test]
    fn every_day_of_two_centuries_goes_there_and_back() {
        let mut before = DateTime::from_seconds(-86_400);
        for day in 0..73_000 {
            let date = DateTime::from_seconds(day * 86_400 + 12_345);
            assert_eq!(date.seconds(), day * 86_400 + 12_345);
            let next = date.day == before.day + 1 && date.month == before.month;
            assert!(next || date.day == 1 && (28..=31).contains(&before.day));
            before = date;
        }
    }
}
